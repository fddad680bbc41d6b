package main

import (
	"context"
	"maps"
	"slices"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/sets"
	informers "k8s.io/client-go/informers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
)

const apiSource = "api"

// podChange is one thing that the watch of our pods said. Without a pod: the first list is complete.
type podChange struct {
	pod  *v1.Pod
	gone bool
}

// arrivals are pods bound to the node that the kubelet has not begun to admit, and the lives of those it has.
type arrivals struct {
	waiting map[types.UID]*v1.Pod
	lives   map[types.UID]context.CancelFunc
}

// syncLoop is the one place where pods are admitted, one at a time. Until the first list is complete nobody is; its
// pods are admitted without delay and before any source counts as ready, as after every start of a kubelet.
func (k *kubelet) syncLoop(ctx context.Context) error {
	changes, err := k.watchPods(ctx)
	if err != nil {
		return err
	}
	pods := arrivals{map[types.UID]*v1.Pod{}, map[types.UID]context.CancelFunc{}}
	var next <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-next:
			k.admitOne(ctx, pods, k.options.longestDelay/2)
			next = nil
		case change := <-changes:
			if change.pod == nil {
				k.firstList(ctx, pods)
			} else {
				k.handle(ctx, pods, change)
			}
		}
		if next == nil && len(pods.waiting) > 0 && k.sources.AllReady() {
			next = time.After(k.chance.within(k.options.longestDelay / 2))
		}
	}
}

func (k *kubelet) watchPods(ctx context.Context) (<-chan podChange, error) {
	changes := make(chan podChange)
	send := func(object any, gone bool) {
		if unknown, missed := object.(cache.DeletedFinalStateUnknown); missed {
			object = unknown.Obj
		}
		change := podChange{gone: gone}
		change.pod, _ = object.(*v1.Pod)
		select {
		case changes <- change:
		case <-ctx.Done():
		}
	}
	ours := func(options *metav1.ListOptions) { options.FieldSelector = "spec.nodeName=" + k.options.node }
	informer := informers.NewFilteredPodInformer(k.client, "", 0, cache.Indexers{}, ours)
	handled, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(added any) { send(added, false) },
		UpdateFunc: func(_, updated any) { send(updated, false) },
		DeleteFunc: func(deleted any) { send(deleted, true) },
	})
	if err != nil {
		return nil, err
	}
	go informer.Run(ctx.Done())
	go func() {
		if cache.WaitForCacheSync(ctx.Done(), handled.HasSynced) {
			send(nil, false)
		}
	}()
	return changes, nil
}

func (k *kubelet) firstList(ctx context.Context, pods arrivals) {
	listed := sets.KeySet(pods.waiting)
	k.allocation.RemoveOrphanedPods(listed)
	for len(pods.waiting) > 0 {
		k.admitOne(ctx, pods, 0)
	}
	k.sources.AddSource(apiSource)
	for _, container := range k.containers.all() {
		if !listed.Has(types.UID(container.UID)) {
			go k.endContainers(ctx, types.UID(container.UID), "orphaned")
		}
	}
}

func (k *kubelet) handle(ctx context.Context, pods arrivals, change podChange) {
	uid := change.pod.UID
	_, knew := k.pods.byUID(uid)
	switch {
	case change.gone:
		delete(pods.waiting, uid)
		k.pods.remove(uid)
		k.allocation.RemovePod(klog.FromContext(ctx), uid)
		pods.end(uid)
		delete(pods.lives, uid)
	case !knew:
		pods.waiting[uid] = change.pod
	default:
		k.pods.put(change.pod)
		k.endIfTold(ctx, pods, change.pod)
	}
}

// endIfTold ends the pod's life when somebody deletes the pod or has given it a final phase.
func (k *kubelet) endIfTold(ctx context.Context, pods arrivals, pod *v1.Pod) {
	if pod.DeletionTimestamp != nil || isFinished(pod) {
		pods.end(pod.UID)
	}
	if pod.DeletionTimestamp != nil && k.pods.isOver(pod.UID) {
		go k.deletePod(ctx, pod)
	}
}

func (a arrivals) end(uid types.UID) {
	if cancel, lives := a.lives[uid]; lives {
		cancel()
	}
}

// admitOne takes any of the waiting pods. From then on it is listed as active; what is decided about it comes after
// another pause.
func (k *kubelet) admitOne(ctx context.Context, pods arrivals, longestPause time.Duration) {
	uids := slices.Sorted(maps.Keys(pods.waiting))
	if len(uids) == 0 {
		return
	}
	uid := uids[k.chance.below(len(uids))]
	pod := pods.waiting[uid]
	delete(pods.waiting, uid)
	k.pods.put(pod)
	if isFinished(pod) {
		go k.endContainers(ctx, uid, "finished")
		k.endIfTold(ctx, pods, pod)
		return
	}
	time.Sleep(k.chance.within(longestPause))
	ok, reason, message := k.allocation.AddPod(ctx, k.pods.GetActivePods(), pod)
	switch {
	case ctx.Err() != nil: // we are ending: an answer that did not come is no refusal
		return
	case !ok:
		k.refuse(ctx, pod, reason, message)
		return
	}
	pods.lives[uid] = k.begin(ctx, pod)
	k.endIfTold(ctx, pods, pod)
}

// refuse fails the pod for good. Its devices are free from now on, whatever admission had given it.
func (k *kubelet) refuse(ctx context.Context, pod *v1.Pod, reason, message string) {
	k.pods.markOver(pod.UID)
	k.write(containerEvent{
		Event: podRefused, UID: string(pod.UID), Namespace: pod.Namespace, Pod: pod.Name,
		Reason: reason, Message: message,
	})
	k.recorder.Event(pod, v1.EventTypeWarning, reason, message)
	go func() {
		k.endContainers(ctx, pod.UID, "refused")
		k.tell(ctx, pod, refusedStatus(pod, reason, message))
	}()
}

func (k *kubelet) write(event containerEvent) {
	if err := k.containers.write(event); err != nil {
		klog.ErrorS(err, "Cannot write what containers do")
		klog.FlushAndExit(klog.ExitFlushTimeout, 1)
	}
}
