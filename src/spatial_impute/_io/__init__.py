"""Files and processes: stores written piece by piece, downloads, workers."""
