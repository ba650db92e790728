"""From a base and adapters to pictures: the pipeline, samplers, decoding, the stamp inside each PNG.

To draw means to make a picture, here and in `grid.draw`. `flat` draws noise and `data` draws samples: there
it means to take at random.
"""
