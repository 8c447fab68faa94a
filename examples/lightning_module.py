"""A LightningModule that logs every collapse metric, and a callback that also measures the model during training."""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from transformers import ViTConfig, ViTForImageClassification

import neuralcollapse as nc
from neuralcollapse.lightning import CollapseCallback


class Training(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        config = ViTConfig(
            image_size=8,
            patch_size=4,
            num_channels=1,
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=128,
            num_labels=10,
        )
        head = nc.NearestETFClassifier(64, num_classes=10)
        self.model = nc.attach_head(ViTForImageClassification(config), head, output="logits")
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.collapse = nc.NeuralCollapse(10, 64, head)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, labels = batch
        return cross_entropy(self.model(images, targets=labels), labels)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        images, labels = batch
        features = self.model.head.features(self.model.model(images).logits)  # multiplied by the weight of the head
        self.accuracy.update(self.model.head(features), labels)
        self.collapse.update(features, labels)
        self.log("val/accuracy", self.accuracy)

    def on_validation_epoch_end(self) -> None:
        self.log_dict({f"val/{name}": value for name, value in self.collapse.compute().items()})
        self.collapse.reset()

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=5e-3)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1), torch.tensor(digits.target)
train = DataLoader(TensorDataset(images[:1500], labels[:1500]), batch_size=50, shuffle=True)
test = DataLoader(TensorDataset(images[1500:], labels[1500:]), batch_size=100)

callback = CollapseCallback({"train": train, "test": test}, every_n_epochs=5)  # measures self.model, as nc.measure does
trainer = lightning.Trainer(
    max_epochs=5,
    accumulate_grad_batches=2,
    precision="bf16-mixed",
    callbacks=[callback],
    accelerator="cpu",
    check_val_every_n_epoch=5,
    num_sanity_val_steps=0,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Training(), train, test)

logged = trainer.callback_metrics
print(f"test accuracy {float(logged['val/accuracy']):.1%}, nc1_quotient {float(logged['val/nc1_quotient']):.3f}")
print(f"{len(logged)} values logged, and in epochs 1 and 5 {len(callback.rows)} by the callback")
