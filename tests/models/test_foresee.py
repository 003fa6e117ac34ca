"""What the plan says before any weights are read is what the run finds once they are."""

from welltuned.models.foresee import ONE_BY_ONE, foresee
from welltuned.models.fuse import fuse
from welltuned.models.lora import LoraSettings, attach

SEEN_BY_TRYING = ("jamba",)  # its configuration does not name the layers that carry state


def test_foreseen_is_found(tools, family, tmp_path):
    model = tools.model(family)
    model.config.save_pretrained(tmp_path)  # no weights beside it
    found = set(fuse(model, attach(model, LoraSettings(r=2))).sentences())
    if not tools.packs(model):
        found.add(ONE_BY_ONE)
    foreseen = set(foresee(str(tmp_path)))
    assert foreseen == (found - {ONE_BY_ONE} if family in SEEN_BY_TRYING else found)


def test_unadapted_parts_and_full_fine_tuning(tools, tmp_path):
    model = tools.model("llama")
    model.config.save_pretrained(tmp_path)
    found = fuse(model, attach(model, LoraSettings(r=2, target_modules=("q_proj",)))).sentences()
    assert found
    assert list(foresee(str(tmp_path), ("q_proj",))) == found
    assert foresee(str(tmp_path), None) == ()
