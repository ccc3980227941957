"""Facts about FX graphs, and the pipeline that runs passes over them."""
