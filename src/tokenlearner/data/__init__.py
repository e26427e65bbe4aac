"""Pictures and clips as the models take them: decoding, folders of classes, splits, batches."""
