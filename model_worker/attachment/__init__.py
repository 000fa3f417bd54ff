"""What is done to a model so that its layers attend to a memory, and how the model is recognised."""
