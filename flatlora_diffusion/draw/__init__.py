"""From a base and adapters to pictures: the pipeline, samplers, decoding, the stamp inside each PNG."""
