"""The processor has a name, also where the system does not tell it."""

import platform

from quernel._machine import processor_name


def test_model_name_is_read(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nmodel name\t: another\n")
    assert processor_name(str(file)) == "Some CPU @ 2 GHz"


def test_fall_back_is_what_python_knows(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\n")
    known = platform.processor() or platform.machine()
    assert processor_name(str(tmp_path / "absent")) == processor_name(str(tmp_path / "cpuinfo")) == known
