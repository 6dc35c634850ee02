"""Folders of tiny random models of `transformers`, with all that their pipelines load."""

import json

import torch
import transformers

LETTERS = " etaoinshrdlu'"


def write_ctc(folder, seed=0):
    """A Wav2Vec2 of 14 letters; 50 frames in a second."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    names = ["<pad>", "<s>", "</s>", "<unk>", "|", *LETTERS[1:]]
    (folder / "vocab.json").write_text(json.dumps({name: k for k, name in enumerate(names)}))
    transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)
    config = transformers.Wav2Vec2Config(
        vocab_size=len(names),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        pad_token_id=0,
    )
    model = transformers.Wav2Vec2ForCTC(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=3.0)  # so that letters change with the sound
    model.save_pretrained(folder)
    return model


def write_whisper(folder, seed=0, alignment=True, languages=("en", "de")):
    """A Whisper that hears two seconds at a time and says something of them."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    letters = [*LETTERS[1:], *(f"Ġ{c}" for c in LETTERS[1:])]
    special = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in languages)]
    special += ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>"]
    special += ["<|nospeech|>", "<|notimestamps|>"]
    times = [f"<|{k * 0.02:.2f}|>" for k in range(101)]
    ids = {name: k for k, name in enumerate([*letters, *special, *times])}
    tokenizer = transformers.WhisperTokenizer(vocab={n: ids[n] for n in letters}, merges=[])
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.add_tokens(times)
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in ids} == ids
    features = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=2)
    transformers.WhisperProcessor(features, tokenizer).save_pretrained(folder)
    config = transformers.WhisperConfig(
        vocab_size=len(ids),
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=100,
        max_target_positions=300,  # pipelines ask for 256 new tokens
        pad_token_id=ids["<|endoftext|>"],
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|endoftext|>"],
        decoder_start_token_id=ids["<|startoftranscript|>"],
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    generation = model.generation_config
    generation._from_model_config = False  # else loading makes it anew, from the model's
    generation.is_multilingual = True
    generation.lang_to_id = {f"<|{code}|>": ids[f"<|{code}|>"] for code in languages}
    generation.task_to_id = {t: ids[f"<|{t}|>"] for t in ("transcribe", "translate")}
    generation.no_timestamps_token_id = ids["<|notimestamps|>"]
    generation.prev_sot_token_id = ids["<|startofprev|>"]
    generation.max_initial_timestamp_index = 50
    if alignment:
        generation.alignment_heads = [[0, 0]]
    model.save_pretrained(folder)
    return model


def write_blip(folder, seed=0):
    """A BLIP that describes pictures in a few words."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "picture", "of", "red", "green"]
    words += ["dog", "ball", "big", "small", "round", "square"]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizer(vocab={w: k for k, w in enumerate(words)})
    pictures = transformers.BlipImageProcessor(size={"height": 16, "width": 16})
    transformers.BlipProcessor(pictures, tokenizer).save_pretrained(folder)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    size |= {"intermediate_size": 32, "projection_dim": 16}
    text = size | {"vocab_size": len(words), "max_position_embeddings": 512, "bos_token_id": 2}
    text |= {"eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0, "encoder_hidden_size": 16}
    vision = size | {"image_size": 16, "patch_size": 4}
    config = transformers.BlipConfig(text_config=text, vision_config=vision)
    model = transformers.BlipForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.text_decoder.cls.predictions.decoder.weight, std=2.0)
    model.save_pretrained(folder)
    return model
