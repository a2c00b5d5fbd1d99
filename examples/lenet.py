"""The job of lenet.yaml, in Python: python examples/lenet.py [RUN to resume]."""

import sys
from functools import partial

import torch

from penstock import Averaging, Job, feed, zoo

job = Job(
    network=zoo.lenet,  # any nn.Module, or a function that makes one
    loss="cross_entropy",
    optimizer=partial(torch.optim.Adagrad, lr=0.01, weight_decay=5e-4),
    train=feed.mnist(split="train"),
    test=feed.mnist(split="test"),
    batch_size=32,  # examples per shard and step
    epochs=5,
    workers=2,
    seed=12345,
    strategy=Averaging(every=5),
)
run = job.run(resume=sys.argv[1] if len(sys.argv) > 1 else None)
print(run.evaluation)
print("mean loss of the last steps:", run.scalars("loss").values[-10:].mean())
