"""Files that become rows: formats, folders, types of columns, and shards."""
