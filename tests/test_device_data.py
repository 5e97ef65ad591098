"""Who has which device: classes, correlated draws, tables, FedScale's files, and what is wrong in them."""

import pickle
import re

import numpy as np
import pytest

from hetfl_jax.data import devices, fedscale
from hetfl_jax.data.devices import COLUMNS, TIMES
from hetfl_jax.run.config import changed
from hetfl_jax.run.devices import equipment_of

SIZE = np.random.default_rng(0).integers(10, 500, 4000)


def test_classes_come_in_their_proportions_at_random_places():
    found = devices.classes(np.ones(80), 0, mix="pi_3:1,phone_2022:3", efficiency=0.5)
    rates, counts = np.unique(found.macs_per_s, return_counts=True)
    assert rates.tolist() == [0.5 * 22.4e9, 0.5 * 136.8e9]
    assert counts.tolist() == [20, 60]
    assert 0 < (found.macs_per_s[:20] < 2e10).sum() < 20
    assert (devices.classes(np.ones(80), 1, mix="pi_3:1,phone_2022:3").macs_per_s != found.macs_per_s / 5).any()
    assert all(one.source and one.peak > 0 for one in devices.CLASSES.values())
    spread = devices.classes(np.ones(4000), 0, mix="laptop:1", spread=0.3).macs_per_s
    assert np.log(spread / 19.2e9).std() == pytest.approx(0.3, rel=0.05)


def test_lognormal_draws_have_their_medians_spreads_and_correlations():
    given = dict(speed_with_data=0.6, bandwidth_with_data=-0.5, speed_with_bandwidth=0.2)
    found = devices.lognormal(SIZE, 0, macs_per_s=1e9, speed_spread=0.8, bandwidth_spread=0.4, up_mbps=5.0, **given)
    speed, band = np.log(found.macs_per_s), np.log(found.up_mbps)
    rank = np.argsort(np.argsort(SIZE))
    data = devices._scores(SIZE, np.random.default_rng(1))
    assert np.exp(np.median(speed)) == pytest.approx(1e9, rel=0.06)
    assert speed.std() == pytest.approx(0.8, rel=0.05)
    assert np.corrcoef(speed, data)[0, 1] == pytest.approx(0.6, abs=0.04)
    assert np.corrcoef(band, data)[0, 1] == pytest.approx(-0.5, abs=0.04)
    assert np.corrcoef(speed, band)[0, 1] == pytest.approx(0.2, abs=0.05)
    np.testing.assert_allclose(found.down_mbps / found.up_mbps, 6.0)
    order = np.argsort(devices.lognormal(SIZE, 0, speed_with_data=-1.0).macs_per_s)
    assert np.corrcoef(np.argsort(order), rank)[0, 1] < -0.999
    with pytest.raises(ValueError, match="correlations that no three quantities can have"):
        devices.lognormal(SIZE, 0, speed_with_data=0.9, bandwidth_with_data=0.9, speed_with_bandwidth=-0.9)
    with pytest.raises(ValueError, match="correlations that no three quantities can have"):
        devices.lognormal(SIZE, 0, speed_with_data=1.0, bandwidth_with_data=0.5)


def test_tables_come_back_as_they_were_written(tmp_path):
    wanted = devices.lognormal(SIZE[:7], 3)
    devices.write_table(tmp_path / "d.csv", wanted)
    for found, column in zip(devices.read_table(tmp_path / "d.csv", 7), wanted):
        np.testing.assert_allclose(found, column, rtol=1e-9)
    online = devices.daily(7, 0, 9.5)
    devices.write_times(tmp_path / "t.csv", online)
    for found, column in zip(devices.read_times(tmp_path / "t.csv", 7), online):
        np.testing.assert_allclose(found, column, rtol=1e-9)
    there = np.isfinite(online.online)
    hours = [(online.offline[i, on] - online.online[i, on]).sum() / 3600 for i, on in enumerate(there)]
    np.testing.assert_allclose(hours, 9.5)


GOOD = "0,1e9,100,5,20\n1,2e9,inf,5,20\n"
#: what stands in the table of two clients -> a part of the line
TABLES = {
    "": "begins with ''",
    "client,speed\n0,1\n": "begins with 'client,speed': need client,macs_per_s,memory_mb,up_mbps,down_mbps",
    f"{','.join(COLUMNS)}\n0,1e9,100,5,20\n": "lacks 1 of 2 clients: 1 (devices.name)",
    f"{','.join(COLUMNS)}\n{GOOD}0,1e9,100,5,20\n": "line 4: client 0 again",
    f"{','.join(COLUMNS)}\n{GOOD}2,1e9,100,5,20\n": "line 4: client '2', allowed 0..1",
    f"{','.join(COLUMNS)}\n0,0,100,5,20\n": "line 2: macs_per_s 0, allowed > 0",
    f"{','.join(COLUMNS)}\n0,-3,100,5,20\n": "line 2: macs_per_s -3, allowed > 0",
    f"{','.join(COLUMNS)}\n0,inf,100,5,20\n": "line 2: macs_per_s inf, allowed > 0",
    f"{','.join(COLUMNS)}\n0,1e9,100,-5,20\n": "line 2: up_mbps -5, allowed > 0",
    f"{','.join(COLUMNS)}\n0,1e9,nan,5,20\n": "line 2: memory_mb nan, allowed > 0",
    f"{','.join(COLUMNS)}\n0,fast,100,5,20\n": "line 2: macs_per_s 'fast': need a number",
    f"{','.join(COLUMNS)}\n0,1e9,100\n": "line 2: 3 values, need 5",
}
ONLINE = {
    f"{','.join(TIMES)}\n0,5,3,10\n": "line 2: need 0 <= online_s < offline_s <= period_s",
    f"{','.join(TIMES)}\n0,0,3,10\n0,5,6,12\n": "line 3: client 0 has period 12 and 10",
    f"{','.join(TIMES)}\n0,0,3,10\n0,2,6,10\n1,0,1,10\n": "client 0 comes online at 2 s while it is online",
    f"{','.join(TIMES)}\n0,0,3,10\n": "client 1 is never online (devices.online)",
}


@pytest.mark.parametrize("text", TABLES)
def test_a_wrong_table_is_one_line(text, tmp_path):
    (tmp_path / "d.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(TABLES[text])):
        devices.read_table(tmp_path / "d.csv", 2)


@pytest.mark.parametrize("text", ONLINE)
def test_a_wrong_table_of_times_is_one_line(text, tmp_path):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(ONLINE[text])):
        devices.read_times(tmp_path / "t.csv", 2)


def write(path, values):
    path.write_bytes(pickle.dumps(values))
    return path


CAPACITY = {11: {"computation": 150.0, "communication": 6000.0}, 12: {"computation": 30, "communication": 900.5}}
BEHAVIOUR = {
    3: {"duration": 100, "finish_time": 200, "active": [20, 90], "inactive": [50, 120], "model": "SM-G960"},
    4: {"duration": 100, "finish_time": 100, "active": [60], "inactive": [30], "model": "ELE-L29"},
}


def test_files_of_fedscales_form_become_tables(tmp_path):
    capacity, behaviour = write(tmp_path / "capacity", CAPACITY), write(tmp_path / "behave", BEHAVIOUR)
    files = fedscale.convert(capacity, behaviour, tmp_path / "out", clients=3, reference_macs=300e6, memory_mb=2048)
    assert [file.name for file in files] == ["devices.csv", "online.csv"]
    config = changed(devices=dict(name=f"csv:{files[0]}", online=f"csv:{files[1]}"))
    found = equipment_of(config, np.ones(3), 0)
    np.testing.assert_allclose(found.profile.macs_per_s, [2e9, 1e10, 2e9])
    np.testing.assert_allclose(found.profile.up_mbps, [6.0, 0.9005, 6.0])
    assert found.profile.memory_mb.tolist() == [2048.0] * 3
    assert found.times.period.tolist() == [200, 100, 200]
    assert found.times.online.tolist() == [[20, 90], [0, 60], [20, 90]]
    assert found.times.offline.tolist() == [[50, 120], [30, 100], [50, 120]]
    assert [file.name for file in fedscale.convert(capacity, None, tmp_path / "two", clients=2)] == ["devices.csv"]


class Evil:
    def __reduce__(self):
        return print, ("no",)


@pytest.mark.parametrize(
    ("capacity", "behaviour", "line"),
    [
        ({1: Evil()}, None, "is no pickle of plain values: it names builtins.print"),
        ({}, None, "holds a dict: need a dict of devices"),
        ([1], None, "holds a list: need a dict of devices"),
        ({1: {"computation": 0, "communication": 5}}, None, "device 1: computation 0, allowed > 0 and finite"),
        ({1: {"computation": 5.0}}, None, "device 1: communication None, allowed > 0"),
        (CAPACITY, {3: {"finish_time": 9, "active": 5}}, "device 3: need lists of seconds 'active' and 'inactive'"),
        (CAPACITY, {3: {"finish_time": 9, "active": [], "inactive": []}}, "device 3 is never online"),
    ],
)
def test_wrong_files_are_one_line(capacity, behaviour, line, tmp_path):
    first = write(tmp_path / "capacity", capacity)
    second = None if behaviour is None else write(tmp_path / "behave", behaviour)
    with pytest.raises(ValueError, match=re.escape(line)):
        fedscale.convert(first, second, tmp_path, clients=1)


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    for read, key in ((devices.read_table, "devices.name"), (devices.read_times, "devices.online")):
        with pytest.raises(ValueError, match=re.escape(f"no file {tmp_path / 'x.csv'} ({key})")):
            read(tmp_path / "x.csv", 2)
