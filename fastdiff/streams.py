"""The numbers of all streams of noise, `step` of `kernels.randn` and `rand`: each has one use.

Sample i of a run or a picture draws from (seed, i, stream).
"""

INITIAL_NOISE = 0  # where sampling starts; the sampler's step i, from the last down to 1, has the stream i

TRAINING = 1 << 31  # the samplers' lie below
NOISE = TRAINING  # of a training image, or of an image that a generator made
LABEL_DROP = TRAINING + 1
GENERATOR_NOISE = TRAINING + 2  # where a one-step generator in training starts
LABELS = TRAINING + 3  # of images that a generator is to make
LATENTS = TRAINING + 4  # of the latents that a VAE draws for an image
