"""Does a pretrained model help on some data? Metrics, baselines and protocols, with intervals."""
