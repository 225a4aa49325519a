from hone_video.workloads import WORKLOADS


def test_workloads_have_the_published_sizes():
    wan, cog = WORKLOADS["wan2.1-1.3b"], WORKLOADS["cogvideox-5b"]
    assert (wan.tokens, wan.joint_text) == (32_760, 0)
    assert wan.size == {"num_frames": 81, "height": 480, "width": 832}
    assert (cog.tokens, cog.joint_text) == (17_776, 226)
    assert cog.size == {"num_frames": 49, "height": 480, "width": 720}
    assert -(-wan.tokens // 128) == 256
    assert -(-cog.tokens // 128) == 139
