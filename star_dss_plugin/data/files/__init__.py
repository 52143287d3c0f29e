"""Files become data sets, and data sets become files, whole or not at all."""
