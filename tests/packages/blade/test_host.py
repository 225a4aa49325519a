from hone_blade.host import load_host


def test_packaged_host_records_the_command_of_its_weights_and_of_its_grades():
    facts = load_host().facts
    assert facts.passed
    assert facts.command.startswith("hone-blade train-host ")
    clips = facts.details["graded"]["clips"]
    assert facts.details["package_command"].startswith(f"python tools/gpu_package_host.py RUN --clips {clips} ")
