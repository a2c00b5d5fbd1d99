"""Networks that the package carries: functions that make an `nn.Module`.

A Job takes the function (`network=zoo.lenet`, `network: penstock.zoo:lenet`), made under the job's
seed, or the module it gives (`network=zoo.lenet()`), which brings the weights it was made with.
"""

from penstock.model.zoo.lenet import lenet

__all__ = ["lenet"]
