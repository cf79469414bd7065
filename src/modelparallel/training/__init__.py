"""What models, optimizers and step functions share: the runtime, gradients' norm, loss scaling, reports."""
