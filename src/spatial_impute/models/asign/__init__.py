"""ASIGN: baselines and graph networks over the spots of a stack, and their blend. Arrays in, arrays out."""
