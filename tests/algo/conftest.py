from hypothesis import settings

# the first call into torch is slow; the per-test timeout bounds a hang
settings.register_profile("torch", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("torch")
