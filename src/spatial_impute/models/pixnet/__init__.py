"""PixNet: a network from an image to a dense map of expression. Arrays in, arrays out."""
