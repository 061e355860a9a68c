from hypothesis import settings

settings.register_profile("torch", settings.get_profile("suite"), max_examples=60, derandomize=True)
settings.load_profile("torch")
