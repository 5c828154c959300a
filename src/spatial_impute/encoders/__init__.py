"""Image encoders: from H&E pixels to features, per patch or as maps."""
