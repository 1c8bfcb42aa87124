"""Q-Rater: numbers of each layer, searched under the loss of the whole model."""
