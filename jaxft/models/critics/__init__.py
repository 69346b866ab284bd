"""Critics: networks that measure pictures during training and are not exported."""
