"""Statistics of landscapes: arrays in, labelled numbers with intervals out. Nothing here draws or writes."""
