"""Reading what is stored: who may, in pages, buckets, plots and files."""
