"""The functions of `import jaxft`, for notebooks and programs."""
