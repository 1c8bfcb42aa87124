"""Plain distillation: the student follows the original in what the weights of the losses say."""

from qtool.training.recipes import PreparedTraining, Trainee, Training, TrainingStage
from qtool.training.recipes._student import FollowOptions, begin_student, schedule_of


def _prepare(trainee: Trainee, options: FollowOptions) -> PreparedTraining:
    follower = begin_student(trainee, options, steady=True)
    learning = follower.following.learning(
        trainee.lessons, list(follower.vectors.values()), lambda _step: None, trainee.parts
    )
    stage = TrainingStage(
        name="train", learning=learning, schedule=schedule_of(trainee, options, trainee.steps)
    )
    return PreparedTraining(
        student=follower.following.student, stages=[stage], results=follower.results
    )


TRAINING = Training(
    summary="Planes, scales, norms and biases learn to follow the original.",
    options=FollowOptions,
    prepare=_prepare,
    learning_rate=1.5e-3,
)
