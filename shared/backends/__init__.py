"""The training-side model behind one Protocol, shared by learner and oracle."""
