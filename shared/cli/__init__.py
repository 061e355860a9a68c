"""The lagwise command: supervisor, recorder, audit, report."""
