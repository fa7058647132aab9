"""Where a method meets a training loop: the Trainer, an Accelerate loop, a torch optimizer."""
