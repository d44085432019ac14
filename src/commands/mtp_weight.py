"""Whether a run trains the MTP block; torch is imported only if there are files to read."""

from pathlib import Path

from jsonargparse import Namespace

from src.models.deepseek_v3.config_json import mtp_loss_weight_of, read_fields


def has_weights(directory: str) -> bool:
    return any(Path(directory).glob("*.safetensors"))


def mtp_loss_weight(model: Namespace, checkpoint: Path | None = None) -> float:
    """model.mtp_loss_weight; null is decided by the checkpoint that a run continues, else by the base.

    A base's config.json may name the block although its weights lack it, as transformers' save_pretrained writes it.

    Raises:
        ValueError: it is positive and there is no block to train; there is no config.json to read; the
            checkpoint's config.yaml is damaged.
    """
    fields, base = read_fields(model.pretrained), f"{model.pretrained}/config.json"
    block = bool(fields.get("num_nextn_predict_layers"))
    if block and checkpoint is not None:
        from src.checkpoints.run_files import read_settings

        recorded = (read_settings(checkpoint).get("model") or {}).get("mtp_loss_weight")
        block, base = recorded is None or recorded > 0, str(checkpoint)
    elif block and not model.from_scratch and has_weights(model.pretrained):
        from src.weights.safetensors_files import has_mtp

        block, base = has_mtp(model.pretrained, fields["num_hidden_layers"]), model.pretrained
    return mtp_loss_weight_of(model.mtp_loss_weight, block, base)
