"""Workers are made from recipes, also where these have been sent to."""

import pickle

import numpy as np

from sb3_async1step.workers.actor_learner import WorkerRecipe
from tests.envs import make_env


def test_a_recipe_that_was_pickled_makes_the_same_worker(algorithm):
    def act(send):
        model = algorithm("MlpPolicy", make_env(4), seed=0)
        settings, generator = model._make_settings(4), np.random.default_rng(0)
        recipe = send(WorkerRecipe(algorithm.actor_learner_class, settings, range(1, 3), generator))
        assert recipe.lanes == range(1, 3)
        env = make_env(2)
        env.seed(3)
        worker = recipe.build(env, env.reset(), model._share_parameters())
        return [worker.step(n).actions.tolist() for n in range(2, 42, 2)]

    assert act(lambda recipe: pickle.loads(pickle.dumps(recipe))) == act(lambda recipe: recipe)
