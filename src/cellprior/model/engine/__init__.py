"""From cells to latents: chunks and sizes, the loop, streams to disk, a Dask cluster."""
