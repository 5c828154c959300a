"""Images: files and arrays in, windows of pixels and masks out. Nothing here knows sections or genes."""
