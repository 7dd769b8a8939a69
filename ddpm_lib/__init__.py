"""Denoising diffusion probabilistic models: a schedule, a denoiser, a sampler, and what a book about them needs."""

from . import plots
from .bound import bound_terms
from .checkpoint import CheckpointError, load_denoiser, pretrained, save_denoiser
from .classifier import Classifier, pretrained_classifier
from .data import cifar10, digits, fashion_mnist, image_folder, load_images, mnist, spiral
from .degradation import Blur, Downsample, Grey, Mask
from .download import DataError
from .guidance import ClassifierGuided, Guided, NoisyClassifier, label_gradient, pretrained_noisy_classifier
from .interop import diffusers_sampling, from_diffusers, to_diffusers
from .inverse import (
    DPS,
    MMPS,
    NullSpace,
    PiGDM,
    Replacement,
    Windows,
    repaint,
    repaint_path,
)
from .loss import capped_loss, simple_loss
from .metrics import frechet_distance, inception_score, kernel_distance, precision_recall, sliced_wasserstein
from .onnx import export_onnx
from .prediction import Denoiser, Prediction
from .released import from_pytorch_diffusion
from .sampling import SampleStep, sample, sample_steps, step, timesteps, transition
from .schedule import Schedule
from .training import NonFiniteError, Trainer, TrainStep, best_device
from .unet import UNet
from .worlds import Gaussian, GaussianMixture

__version__ = "0.1.0"
__all__ = [
    "DPS",
    "MMPS",
    "Blur",
    "CheckpointError",
    "Classifier",
    "ClassifierGuided",
    "DataError",
    "Denoiser",
    "Downsample",
    "Gaussian",
    "GaussianMixture",
    "Grey",
    "Guided",
    "Mask",
    "NoisyClassifier",
    "NonFiniteError",
    "NullSpace",
    "PiGDM",
    "Prediction",
    "Replacement",
    "SampleStep",
    "Schedule",
    "TrainStep",
    "Trainer",
    "UNet",
    "Windows",
    "best_device",
    "bound_terms",
    "capped_loss",
    "cifar10",
    "diffusers_sampling",
    "digits",
    "export_onnx",
    "fashion_mnist",
    "frechet_distance",
    "from_diffusers",
    "from_pytorch_diffusion",
    "image_folder",
    "inception_score",
    "kernel_distance",
    "label_gradient",
    "load_denoiser",
    "load_images",
    "mnist",
    "plots",
    "precision_recall",
    "pretrained",
    "pretrained_classifier",
    "pretrained_noisy_classifier",
    "repaint",
    "repaint_path",
    "sample",
    "sample_steps",
    "save_denoiser",
    "simple_loss",
    "sliced_wasserstein",
    "spiral",
    "step",
    "timesteps",
    "to_diffusers",
    "transition",
]
