"""Steps of the pipeline: frozen data in, frozen data out."""
