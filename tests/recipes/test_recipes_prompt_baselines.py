"""The controls of prompt reductions."""

from prompt_contexts import kept, noise, prompt_context

from tubelet.recipes import RandomPrompt, UniformFrames


def test_RandomPrompt_does_not_look_at_the_video():
    one = RandomPrompt(keep_ratio=0.3).plan(prompt_context(noise(seed=0)))
    other = RandomPrompt(keep_ratio=0.3).plan(prompt_context(noise(seed=1)))
    assert kept(one) == kept(other)
    assert len(kept(one)) == 20


def test_RandomPrompt_depends_on_its_seed():
    one = RandomPrompt(seed=0).plan(prompt_context(noise()))
    other = RandomPrompt(seed=1).plan(prompt_context(noise()))
    assert kept(one) != kept(other)


def test_UniformFrames_keeps_whole_frames_spread_over_the_clip():
    plan = UniformFrames(keep_ratio=0.5).plan(prompt_context(noise(8)))
    assert sorted({place // 16 for place in kept(plan)}) == [1, 3, 5, 7]
    assert len(kept(plan)) == 64


def test_UniformFrames_takes_the_middle_frame_when_it_may_keep_one():
    plan = UniformFrames(keep_ratio=0.01).plan(prompt_context(noise(5)))
    assert kept(plan) == list(range(2 * 16, 3 * 16))
