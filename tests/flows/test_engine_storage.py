"""An output whose disk fails here and there, whose items went, or that another version wrote."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from engine_kit import kinds, make_store, published, recorder, same, tiny_plan

from flows.engine import publish as publishing
from flows.engine.campaign import CampaignError, run_plan
from flows.engine.executor import InlineExecutor
from flows.engine.garbage import collect_garbage
from flows.engine.objects import LocalObjects
from flows.engine.plan import Plan
from flows.engine.quarantine import list_quarantine
from flows.engine.receipt import NewerFormatError, seal, unseal
from flows.engine.restored import open_restored
from flows.engine.verify import verify_output
from flows.engine.worker import BlockJob, BlockWorker


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("in") / "m.zarr", items=6, shape=(1, 2, 12, 16))


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("out")
    run(three(store, out))
    return published(out)


def three(store: Path, output: Path) -> Plan:
    return tiny_plan(store, output, items=["item-0", "item-1", "item-2"])


def run(plan, on_event=None):
    return run_plan(plan, InlineExecutor(), on_event, sleep=lambda _: None)


def get_fails(monkeypatch, where: str, code: int = errno.EIO) -> list[str]:
    """Reads of the first key that has `where` in it fail; returns the keys."""
    get, failed = LocalObjects.get, []

    def fail(self, key):
        if where in key and (not failed or key == failed[0]):
            failed.append(key)
            raise OSError(code, os.strerror(code), key)
        return get(self, key)

    monkeypatch.setattr(LocalObjects, "get", fail)
    return failed


def assemble_fails(monkeypatch, code: int, keys: set[str] | None = None) -> None:
    """Items are not put together, or those of the keys are not."""
    assemble = publishing._assemble

    def fail(objects, item, *rest):
        if keys is None or item.key in keys:
            raise OSError(code, os.strerror(code))
        return assemble(objects, item, *rest)

    monkeypatch.setattr(publishing, "_assemble", fail)


def sealed(path: Path, change) -> None:
    """Change the content of a sealed object, and seal it again."""
    body = unseal(path.read_bytes())
    path.write_bytes(seal(change(body)))


def receipt_of(plan: Plan) -> Path:
    """A receipt of the first block."""
    item = plan.items[0]
    BlockWorker().attempt(BlockJob(plan.measurements, plan.output, item, 0))
    return plan.output / item.work / "receipts/000000.json"


# --- bad sectors ---------------------------------------------------------------------------------


def test_a_staged_chunk_that_cannot_be_read_is_computed_again(
    store, tmp_path, undisturbed, monkeypatch
):
    plan = three(store, tmp_path)
    with monkeypatch.context() as patch:
        assemble_fails(patch, errno.ENOSPC)
        with pytest.raises(CampaignError, match="No space left"):
            run(plan)
    failed = get_fails(monkeypatch, "/stage/")
    assert run(plan).num_computed == 4 + 1  # two of the first item's were done
    assert failed
    assert same(published(tmp_path), undisturbed)


@pytest.mark.parametrize("where", ["/receipts/", "manifests/"])
def test_a_receipt_or_manifest_that_cannot_be_read_is_made_again(
    store, tmp_path, undisturbed, monkeypatch, where
):
    plan = three(store, tmp_path)
    receipt_of(plan)
    if where == "manifests/":
        run(plan)
    failed = get_fails(monkeypatch, where)
    assert run(plan).quarantined == ()
    assert failed
    monkeypatch.undo()
    assert same(published(tmp_path), undisturbed)


def test_receipts_that_cannot_be_listed_are_looked_for_by_those_who_need_them(
    store, tmp_path, undisturbed, monkeypatch
):
    plan = three(store, tmp_path)
    receipt_of(plan)
    names = LocalObjects.names

    def fail(self, prefix):
        if prefix.endswith("/receipts"):
            raise OSError(errno.ESTALE, "Stale file handle")
        return names(self, prefix)

    monkeypatch.setattr(LocalObjects, "names", fail)
    assert run(plan).num_computed == 5
    assert same(published(tmp_path), undisturbed)


def test_an_item_that_cannot_be_published_is_given_up_and_the_others_are_not(
    store, tmp_path, monkeypatch
):
    plan = three(store, tmp_path)
    assemble_fails(monkeypatch, errno.EACCES, {plan.items[0].key})
    events, handler = recorder()
    result = run(plan, handler)
    assert [(q.item_id, q.kind, q.attempts) for q in result.quarantined] == [("item-0", "io", 3)]
    assert "cannot be published" in result.quarantined[0].reason
    assert len(result.published) == 2
    told = [e for e in events if e.kind in ("retry", "quarantined")]
    assert len(told) == 3
    assert all("block" not in e.facts for e in told)
    monkeypatch.undo()
    again = run(plan)
    assert (again.num_computed, len(again.published)) == (0, 3)  # its blocks are kept


@pytest.mark.parametrize("number", [2, 6])
def test_where_no_item_can_be_published_the_run_stops_and_condemns_nobody(
    store, tmp_path, monkeypatch, number
):
    plan = tiny_plan(store, tmp_path, items=[f"item-{i}" for i in range(number)])
    assemble_fails(monkeypatch, errno.EIO)
    with pytest.raises(CampaignError, match=f"storage fails: {min(number, 5)} items"):
        run(plan)
    assert list_quarantine(LocalObjects(tmp_path)) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_takes_nothing_stops_the_run_at_once(store, tmp_path, monkeypatch, code):
    assemble_fails(monkeypatch, code)
    events, handler = recorder()
    with pytest.raises(CampaignError, match=r"item-0 .* cannot be published"):
        run(three(store, tmp_path), handler)
    assert "retry" not in kinds(events)


# --- items that are gone -------------------------------------------------------------------------


def test_items_whose_pixels_are_gone_are_made_again_and_not_said_to_be_there(
    store, tmp_path, undisturbed
):
    plan = three(store, tmp_path)
    run(plan)
    shutil.rmtree(tmp_path / "items/item-0")
    ledgers = [e.path / "ledger.json" for e in open_restored(tmp_path).items()]
    ledgers[1].write_bytes(ledgers[2].read_bytes())
    result = run(plan)
    assert (result.num_computed, len(result.reused), len(result.published)) == (4, 1, 3)
    assert same(published(tmp_path), undisturbed)
    assert verify_output(LocalObjects(tmp_path)).intact


def test_a_publisher_whose_item_went_while_it_slept_publishes_again(
    store, tmp_path, undisturbed, monkeypatch
):
    plan, take, slept = three(store, tmp_path), publishing.take_fence, []

    def sleep(objects, attempt, holder):
        taken = take(objects, attempt, holder)
        if not slept:
            slept.append(attempt)
            shutil.rmtree(tmp_path / "items/item-0")
        return taken

    monkeypatch.setattr(publishing, "take_fence", sleep)
    assert len(run(plan).published) == 3
    assert same(published(tmp_path), undisturbed)


# --- other versions ------------------------------------------------------------------------------

ODD = {
    "a list": lambda body: [1, 2],
    "a field more": lambda body: {**body, "account": {**body["account"], "watts": 1.0}},
    "a field less": lambda body: {k: v for k, v in body.items() if k != "attempt"},
    "no chunks": lambda body: {**body, "chunks": None},
    "older": lambda body: {**body, "format": 0},
}


@pytest.mark.parametrize("odd", ODD)
def test_a_receipt_that_is_not_of_this_version_is_set_aside(store, tmp_path, undisturbed, odd):
    plan = three(store, tmp_path)
    path = receipt_of(plan)
    sealed(path, ODD[odd])
    (damage,) = verify_output(LocalObjects(tmp_path)).damages
    assert damage.fault == "unreadable"
    collect_garbage(LocalObjects(tmp_path), min_age_s=0)
    assert run(plan).num_computed == 6
    assert same(published(tmp_path), undisturbed)


ODD_MANIFESTS = {
    "a list": lambda body: [1, 2],
    "a field less": lambda body: {k: v for k, v in body.items() if k != "exact_data"},
    "another record": lambda body: {**body, "record": {**body["record"], "weight": 1}},
    "no method": lambda body: {**body, "method": None},
    "another's": lambda body: {**body, "key": "0" * 64},
}


@pytest.mark.parametrize("odd", ODD_MANIFESTS)
def test_a_manifest_that_is_not_of_this_version_hides_its_item_until_it_is_made_again(
    store, tmp_path, undisturbed, odd
):
    plan = three(store, tmp_path)
    run(plan)
    sealed(tmp_path / f"manifests/{plan.items[0].key}.json", ODD_MANIFESTS[odd])
    assert len(published(tmp_path)) == 2
    assert not verify_output(LocalObjects(tmp_path)).intact
    result = run(plan)
    assert (result.num_computed, len(result.reused)) == (2, 2)
    assert same(published(tmp_path), undisturbed)


@pytest.mark.parametrize("place", ["manifests", "receipts"])
def test_what_a_newer_version_wrote_is_refused_in_a_sentence_and_left_alone(store, tmp_path, place):
    plan = three(store, tmp_path)
    path = receipt_of(plan)
    if place == "manifests":
        run(plan)
        path = tmp_path / f"manifests/{plan.items[0].key}.json"
    sealed(path, lambda body: {**body, "format": 3, "watts": 1.0})
    before = path.read_bytes()
    with pytest.raises(CampaignError, match=r"a newer sashiko wrote it \(format 3.*update"):
        run(plan)
    for look in (verify_output, lambda objects: collect_garbage(objects, min_age_s=0)):
        with pytest.raises(NewerFormatError, match="update sashiko"):
            look(LocalObjects(tmp_path))
    assert path.read_bytes() == before
    assert json.loads(before)["body"]["format"] == 3


# --- a disk that lies ----------------------------------------------------------------------------


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def test_a_chunk_that_was_not_stored_as_written_is_noticed_when_it_is_staged(
    store, tmp_path, undisturbed, monkeypatch
):
    put, torn = LocalObjects.put, []

    def tear(self, key, data):
        if "/stage/" in key and not torn:
            torn.append(key)
            data = flipped(data)
        put(self, key, data)

    monkeypatch.setattr(LocalObjects, "put", tear)
    events, handler = recorder()
    assert len(run(three(store, tmp_path), handler).published) == 3
    assert [e.facts["failure"] for e in events if e.kind == "retry"] == ["io"]
    assert "corrupt" not in kinds(events)  # before there was a receipt
    assert same(published(tmp_path), undisturbed)


def test_blocks_that_change_whenever_they_are_staged_are_not_computed_for_ever(
    store, tmp_path, monkeypatch
):
    create = LocalObjects.create

    def rot(self, key, data, *, durable=True):
        made = create(self, key, data, durable=durable)
        if "/receipts/" in key:  # what it vouches for changes as soon as it is there
            for path in (tmp_path / key).parents[1].glob("stage/*"):
                path.write_bytes(flipped(path.read_bytes()))
            computed.append(key)
            assert len(computed) < 20
        return made

    computed: list[str] = []
    monkeypatch.setattr(LocalObjects, "create", rot)
    plan = tiny_plan(store, tmp_path, items=["item-0"])
    (given_up,) = run(plan).quarantined
    assert (given_up.kind, given_up.attempts) == ("io", 3)
    assert "check the disk" in given_up.reason
    assert published(tmp_path) == {}


def test_a_driver_that_dies_at_the_manifest_leaves_all_its_work(
    store, tmp_path, undisturbed, monkeypatch
):
    class DeadError(BaseException):
        pass

    def die(self, key, data, *, durable=True):
        if key.startswith("manifests/"):
            raise DeadError
        return create(self, key, data, durable=durable)

    plan, create = three(store, tmp_path), LocalObjects.create
    with monkeypatch.context() as patch:
        patch.setattr(LocalObjects, "create", die)
        with pytest.raises(DeadError):
            run(plan)
    assert run(plan).num_computed == 6 - 2
    assert same(published(tmp_path), undisturbed)
