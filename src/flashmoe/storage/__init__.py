"""Where expert bytes are and how they are read: file formats, the expert catalog, direct I/O."""
