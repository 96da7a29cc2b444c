"""Embedded tasks: small worlds of pictured questions that train on a laptop, without a download.

A world makes its own prompts, pictures and right answers, and ships a model small enough for CPU.
It knows nothing of training, and imports only this folder. The method never depends on it: with
--model and --dataset the same commands run on real models and data.

cards           the world of digit cards: hands, pictures, questions
build_cards     trains this world's base and teacher; only needed to rebuild them
cards_base/     the tiny base policy, right about once in 400 answers
cards_lax/      the base of the lax form, in which the total alone is judged
cards_teacher/  a model of the same size, nearly always right, that writes in another way

staircase        the world of red and black cards: half of the prompts need a rare skill
build_staircase  trains its base, which does everything but carry and borrow; only to rebuild it
staircase_base/  that base; staircase.base_at(b) makes its borrows as rare as b
"""
