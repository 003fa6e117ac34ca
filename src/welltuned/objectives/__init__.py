"""What a micro-batch's loss is. Normalisation is not decided here: the caller gives the denominator."""
