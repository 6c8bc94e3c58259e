"""Images: sources and packed sets, their index, the sample stream, augmentations and the loaders."""
