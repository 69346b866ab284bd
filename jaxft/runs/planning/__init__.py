"""Planning: a step compiled for devices that may not be here, and its costs."""
