"""A loss scale on a CPU: mixed precision in float16 as a GPU has it, for tests of what a scaled gradient does."""

import torch


class Scaled:
    """Puts a CPU GradScaler where the Trainer would have a CUDA one (with use_cpu, fp16 gives none, silently)."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, trainer):
        prepare = trainer.accelerator.prepare
        trainer.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=self.scale, growth_interval=1000)

        def prepared(*objects, **kwargs):
            out = prepare(*objects, **kwargs)
            for thing in out if isinstance(out, tuple) else (out,):
                if hasattr(thing, "step_was_skipped"):
                    thing.scaler = scaler
                    thing._accelerate_step_called = False
                    thing._optimizer_original_step_method = thing.optimizer.step
                    thing._optimizer_patched_step_method = patched(thing, thing.optimizer.step)
            return out

        trainer.accelerator.prepare = prepared
        trainer.accelerator.unscale_gradients = lambda: scaler.unscale_(trainer.optimizer.optimizer)
        return scaler


def patched(optimizer, method):
    def step(*args, **kwargs):
        optimizer._accelerate_step_called = True
        return method(*args, **kwargs)

    return step
