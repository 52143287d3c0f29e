"""Read files as rows: formats, folders, column types and shards."""
