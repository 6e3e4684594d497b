//! Files in a bucket of a server that speaks S3.

use std::{fs, path::Path, time::Duration};

use proto::v1::{DeleteGenerationRequest, DownloadVideoRequest, GenerationState};
use s3_server::Server;

use crate::{
    durable::{create, step, video, watch},
    processes::client,
    stack::{Stack, tiny_models, web},
};

/// How long a slow machine may take to tidy up.
const LONG: Duration = Duration::from_secs(120);

/// The flags of a gateway with its files on a server, and more flags; the credentials are in a file of the folder.
fn flags(server: &Server, folder: &Path, more: &[&str]) -> Vec<String> {
    let credentials = folder.join("credentials");
    fs::write(&credentials, server.credentials()).unwrap();
    let bucket = format!("s3://{}/avatar", server.bucket());
    let flags = ["--artifacts", &bucket, "--artifacts-endpoint", server.url(), "--artifacts-credentials-file"];
    let flags = [&flags[..], &[credentials.to_str().unwrap()], more].concat();
    flags.into_iter().map(str::to_owned).collect()
}

fn borrowed(flags: &[String]) -> Vec<&str> {
    flags.iter().map(String::as_str).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_process_goes_on_from_a_bucket_and_what_is_deleted_leaves_it() {
    let (models, folder) = (tiny_models(), tempfile::tempdir().unwrap());
    let server = Server::start().unwrap();
    let mut stack = Stack::one_with(&models, &borrowed(&flags(&server, folder.path(), &["--keep-encoded-bytes", "0"])));
    let undisturbed = create(&stack, "").await.unwrap().generation_id;
    watch(&stack, &undisturbed, 0, |_| false).await;
    let wanted = video(&stack, &undisturbed, folder.path()).await;

    let id = create(&stack, "").await.unwrap().generation_id;
    let before = watch(&stack, &id, 0, |event| step(event) >= 2).await;
    stack.kill_and_restart();
    let after = watch(&stack, &id, before.len() as u64 + 1, |_| false).await;
    assert_eq!(after.last().unwrap().state(), GenerationState::Completed, "{after:?}");
    assert!(after.iter().any(|event| event.message.starts_with("goes on after step")), "{after:?}");
    assert!(video(&stack, &id, folder.path()).await == wanted);

    let url = format!("{}/v1/videos/{id}/content", stack.http());
    let whole = web().get(&url).send().await.unwrap().bytes().await.unwrap();
    let part = web().get(&url).header("range", "bytes=100-299").send().await.unwrap();
    assert_eq!(
        (part.status().as_u16(), part.headers()["content-range"].to_str().unwrap().starts_with("bytes 100-299/")),
        (206, true)
    );
    assert_eq!(part.bytes().await.unwrap(), whole[100..300]);
    let request = DownloadVideoRequest { generation_id: id.clone(), offset: whole.len() as u64 - 10 };
    let mut answers = client(&stack.grpc()).await.download_video(request).await.unwrap().into_inner();
    let mut end = Vec::new();
    while let Some(answer) = answers.message().await.unwrap() {
        end.extend(answer.data);
    }
    assert_eq!(end, whole[whole.len() - 10..]);

    assert!(server.objects("avatar").unwrap().len() > 2, "both videos, and whose files they are");
    for generation_id in [undisturbed, id] {
        client(&stack.grpc()).await.delete_generation(DeleteGenerationRequest { generation_id }).await.unwrap();
    }
    // What the encoders gave is kept without a generation, and tidied up at the start.
    stack.kill_and_restart();
    let emptied = async {
        while server.objects("avatar").unwrap() != ["owner"] {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let emptied = tokio::time::timeout(LONG, emptied).await;
    assert!(emptied.is_ok(), "{:?}", server.objects("avatar"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_shares_no_folder_goes_on_with_what_one_that_is_gone_had_begun() {
    let (models, folder) = (tiny_models(), tempfile::tempdir().unwrap());
    let (server, database) = (Server::start().unwrap(), postgres_server::Server::start().unwrap());
    let more = ["--database", &database.url("postgres"), "--lease", "2"];
    let mut stack = Stack::six_with(&models, &borrowed(&flags(&server, folder.path(), &more)));
    let undisturbed = create(&stack, "").await.unwrap().generation_id;
    watch(&stack, &undisturbed, 0, |_| false).await;
    let wanted = video(&stack, &undisturbed, folder.path()).await;
    let id = create(&stack, "").await.unwrap().generation_id;
    let before = watch(&stack, &id, 0, |event| step(event) >= 2).await;
    stack.gateway.kill();
    stack.gateway = stack.another_gateway_in(&folder.path().join("other"));
    let after = watch(&stack, &id, before.len() as u64 + 1, |_| false).await;
    assert_eq!(after.last().unwrap().state(), GenerationState::Completed, "{after:?}");
    assert!(after.iter().any(|event| event.message.starts_with("goes on after step")), "{after:?}");
    for one in [id, undisturbed] {
        assert!(video(&stack, &one, folder.path()).await == wanted, "{one}");
    }
}
