"""Networks that the package carries: functions that make an `nn.Module`.

A Job takes the function (`network=zoo.lenet`, `network: penstock.zoo:lenet`), made under the job's
seed, or the module it gives (`network=zoo.lenet()`), which brings the weights it was made with.

Defaults are the sizes of the papers; every size is a keyword. What a forward pass computes, and in
which shapes, never depends on the numbers it is given. Outputs are logits with classes in dim 1, as
`cross_entropy` takes them: `(batch, classes)`, or `(batch, vocabulary, length)` of texts.
"""

from penstock.model.zoo.autoencoder import autoencoder, convolutional_autoencoder
from penstock.model.zoo.bert import bert
from penstock.model.zoo.gpt import gpt
from penstock.model.zoo.lenet import lenet
from penstock.model.zoo.mixture import mixture_of_experts
from penstock.model.zoo.mlp import mlp
from penstock.model.zoo.recommender import recommender
from penstock.model.zoo.recurrent import text_lstm
from penstock.model.zoo.resnet import resnet
from penstock.model.zoo.vgg import vgg16
from penstock.model.zoo.vit import vit

__all__ = [
    "autoencoder",
    "bert",
    "convolutional_autoencoder",
    "gpt",
    "lenet",
    "mixture_of_experts",
    "mlp",
    "recommender",
    "resnet",
    "text_lstm",
    "vgg16",
    "vit",
]
