"""Sources of pictures: folders, tar files, tables of Parquet or Arrow, and TFDS splits."""
