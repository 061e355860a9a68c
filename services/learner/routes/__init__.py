"""Old-logit routes of the learner: one interface, one file each."""
