"""Shared prefixes in TRL's SFTTrainer: its own data preparation, schedule and saving, atomtune's rows and loss."""

from trl import SFTTrainer

from atomtune import share_prefixes


class SharingSFTTrainer(SFTTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.loss_type == "dft" or self.compute_loss_func is not None:
            raise ValueError("Shared prefixes have the loss 'nll': leave out loss_type 'dft' and compute_loss_func.")
        self.sharing = share_prefixes(self.model)
        self.data_collator = self.sharing.collate

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        smoothing = self.args.label_smoothing_factor
        loss = self.sharing.loss(model, inputs, num_items_in_batch, label_smoothing=smoothing)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # tokens are counted over all processes, gradients averaged
        return (loss, {}) if return_outputs else loss
