"""From cells to weights: the training loop, objectives beside their floors, annotation and rejection."""
